from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import results_page

SPREAD = {"median": 20.0, "low": 19.0, "high": 21.0, "rounds": 3}
MACHINE = {"device": "cuda", "device_name": "Some GPU", "cpu": "Some CPU", "torch": "2.11.0", "cuda": "13.0"}


def report(benchmark: str, **cases: Any) -> dict[str, Any]:
    return {
        "benchmark": benchmark, "machine": MACHINE, "date": "2026-11-24T17:00:00", "commit": "0123456789",
        "arguments": {}, "cases": cases,
    }  # fmt: skip


FP8 = report(
    "fp8-decoder",
    decoder={
        "contenders": {
            "bf16": {"step_ms": SPREAD, "peak_gib": 5.26, "check": "passed"},
            "ours": {"check": "failed: killed after 60 s"},
        },
        "targets": [{"what": "ours / bf16", "contender": None, "value": None, "outcome": "not measured"}],
    },
)


def test_what_failed_or_was_not_measured_is_on_the_page() -> None:
    page = results_page.render([("fp8-decoder.json", FP8)])
    assert "## fp8-decoder\n\nSome GPU, torch 2.11.0, CUDA 13.0, 2026-11-24, commit 0123456.\n" in page
    assert "| bf16 | 20 (19-21) | 5.3 | - | - | - | passed |" in page
    assert "| ours | - | - | - | - | - | failed: killed after 60 s |" in page
    assert "| ours / bf16 | - | - | not measured |" in page


def test_changes_of_recipe_have_a_row_each() -> None:
    switch = {
        "to": "block", "apply_s": 0.0124, "first_step_s": 0.3, "step_ms": SPREAD, "compilations": 0, "outcome": "met",
    }  # fmt: skip
    cases = {"ours-block": {"switches": [switch], "check": "passed"}, "ours-row": {"check": "failed: exit status 1"}}
    page = results_page.render([("fp8-switch.json", report("fp8-switch", **cases))])
    assert "| ours-block | block | 0.012 | 0.300 | 20 (19-21) | 0 | met |" in page
    assert "| ours-row | - | - | - | - | - | failed: exit status 1 |" in page


def test_what_looking_costs_has_a_row_for_each_way_of_it() -> None:
    times = {"step_ms": SPREAD, "extra_ms": SPREAD, "share": 1.0}
    case = {
        "probe": times, "probe_every": 200, "probe_share": 0.005, "controlled": 24,
        "statistics": times, "statistics_every": 50, "statistics_share": 0.0008,
    }  # fmt: skip
    page = results_page.render([("adaptive-overhead.json", report("adaptive-overhead", gpt=case))])
    assert "| gpt probe | 20 (19-21) | 20 (19-21) | 200 | 0.50% | 24 |" in page
    assert "| gpt statistics | 20 (19-21) | 20 (19-21) | 50 | 0.08% |  |" in page


def test_the_largest_batch_has_a_row_for_each_arm_with_what_it_took() -> None:
    arms = {
        "fp32": {"size": 20, "times": 1.0, "measures": [], "check": "passed"},
        "auto": {"size": 81, "times": 4.05, "measures": ["fused_loss=auto", "states=8bit"], "check": "passed"},
        "late": {"check": "failed: killed after 60 s"},
    }
    cases = {"bert": {"gib": 32, "arms": arms, "check": "passed"}, "other": {"check": "failed: x"}}
    page = results_page.render([("batch-size.json", report("batch-size", **cases))])
    assert "| bert, 32 GiB | fp32 | 20 | 1.00 |  | passed |" in page
    assert "| bert, 32 GiB | auto | 81 | 4.05 | fused_loss=auto, states=8bit | passed |" in page
    assert "| bert, 32 GiB | late | - | - |  | failed: killed after 60 s |" in page


def test_int8_has_times_points_and_what_was_asked() -> None:
    arms = ("fp32 eager", "fp32", "bf16", "bf16 graph", "torchao", "int8")
    found = {"ms": dict.fromkeys(arms, SPREAD), "int8_over_torchao": SPREAD, "bf16_over_int8": SPREAD}
    means = {"fp32": 97.5, "torchao": 94.0, "int8 calibrated": 94.5, "int8 trained": 97.0}
    case = {
        "times": {"64": found}, "accuracy": {"mean": means | {"int8 trained, learned steps": 96.0}},
        "targets": {"at most 0.5 points below FP32": "reached: 0.50"}, "check": "passed",
    }  # fmt: skip
    four = {"fp32": 97.5, "int4 rounded": 90.25, "int4 trained": 96.5, "int4 trained, learned steps": 97.0}
    narrow = {"accuracy": {"mean": four}, "targets": {}, "check": "passed", "commit": "0123456789"}
    cases = {"mlp": case, "gpt": {"check": "failed", "error": "x"}, "mlp int4": narrow}
    page = results_page.render([("qat.json", report("qat", **cases))])
    assert "| mlp int4 (commit 0123456) | 97.50 | 90.25 | 96.50 | 97.00 |" in page
    assert "torchao" not in results_page.render([("qat.json", report("qat", **{"mlp int4": narrow}))])
    assert "| mlp | 64" + " | 20 (19-21)" * 8 in page
    assert "| mlp | 97.50 | 94.00 | 94.50 | 97.00 | 96.00 |" in page
    assert "| mlp | at most 0.5 points below FP32 | reached: 0.50 |" in page
    assert "| gpt | to run | failed |" in page


def test_memory_has_a_row_for_each_arm() -> None:
    result = {
        "step_ms": SPREAD, "peak_mib": 1000.4, "reserved_mib": 1100.0, "start_reserved_mib": None, "resident_mib": 90.0,
        "check": "passed",
    }  # fmt: skip
    arms = {"bf16": result, "fp32": {"check": "failed: out of memory"}, "far": {**result, "check": "void: a loss"}}
    over = {"bf16": {"step_ms": SPREAD, "peak_mib": 1.0}}
    case = {"arms": arms, "over_bf16": over, "check": "fp32: failed"}
    page = results_page.render([("memory.json", report("memory", decoder=case, bert={"check": "failed: x"}))])
    assert "| decoder | bf16 | 20 (19-21) | 20 (19-21) | 1000 | 1.000 | 1100 | - | 90 | passed |" in page
    assert "| decoder | fp32 | - | - | - | - | - | - | - | failed: out of memory |" in page
    assert "| decoder | far | 20 (19-21) | - | 1000 | - | 1100 | - | 90 | void: a loss |" in page


def test_what_trainings_come_to_is_paired_with_bf16_at_the_same_seed() -> None:
    cases = {
        "gpt bf16 seed 0": {"final_loss": 1.0, "unseen_loss": 1.5, "quality": 0.5, "check": "passed"},
        "gpt bf16 seed 1": {"final_loss": 2.0, "unseen_loss": 2.5, "quality": 0.25, "check": "passed"},
        "gpt ours seed 0": {"final_loss": None, "unseen_loss": 9.0, "quality": 0.1, "check": "a loss is not finite"},
        "gpt ours seed 1": {"final_loss": 2.02, "unseen_loss": 2.525, "quality": 0.3, "check": "passed"},
    }
    page = results_page.render([("memory-quality.json", report("memory-quality", **cases))])
    assert "| gpt | bf16 | 1.0000, 2.0000 | 1.5000, 2.5000 | +0.00, +0.00 | 0.500, 0.250 | passed |" in page
    assert "| gpt | ours | 2.0200 | 2.5250 | +1.00 | 0.300 | a loss is not finite; passed |" in page


def test_offloading_has_a_row_for_each_case_and_one_for_each_step_of_the_host() -> None:
    host = {"values": 1000, "host_ms": {"fused": SPREAD}, "ratio": {"fused": SPREAD}, "check": "passed"}
    sync = {"share": 0.5, "step_ms": SPREAD, "predicted_ms": 20.5, "host_step_ms": 7.25, "check": "passed"}
    on_device = {"step_ms": SPREAD, "state_bytes": 21.5e9, "check": "passed"}
    failed = {"check": "failed", "error": "out of memory"}
    target = {"what": "memory gone", "contender": "sync", "value": 0.87, "outcome": "met"}
    found = report("offload", host=host, sync=sync, delayed=failed, device=on_device)
    found["arguments"] = {"targets": [target]}
    page = results_page.render([("offload.json", found)])
    assert "| fused | 20 (19-21) | 20 (19-21) | passed |" in page
    assert "| sync | 0.50 | 20 (19-21) | 20.50 | 7.25 | - | passed |" in page
    assert "| device | - | 20 (19-21) | - | - | 21.50 | passed |" in page
    assert "| delayed | - | - | - | - | - | failed |" in page
    assert "| memory gone | sync | 0.87 | met |" in page


def test_policies_that_broke_are_in_bold() -> None:
    kept = {"gap": 0.001, "own_gap": 0.0049, "finite": 3, "broken": 1, "seeds": 3}
    lost = {"gap": 0.0461, "own_gap": 0.07, "finite": 3, "broken": 2, "seeds": 3}
    gone = {"gap": 0.5, "own_gap": float("inf"), "finite": 0, "broken": 3, "seeds": 3}
    cases = {
        "outlier": {"policies": {"fp32": kept, "fp8_block": lost}, "check": "passed"},
        "drift": {"policies": {"fp16_amp": gone}, "check": "passed"},
        "other": {"check": "failed", "error": "out of memory"},
    }
    page = results_page.render([("stress-cpu.json", report("stress", **cases))])
    assert "/ as trained | fp32 | fp8_block | fp16_amp | check |" in page
    assert "| outlier | +0.10 / +0.49 | **+4.61 / +7.00** | - | passed |" in page
    assert "| drift | - | - | **not finite** | passed |" in page
    assert "| other | - | - | - | failed |" in page


def test_fusions_have_a_table_for_each_recipe() -> None:
    variants = {
        "all-on": {"step_ms": SPREAD, "more_step_ms": 0.0, "peak_gib": 46.66, "more_peak_gib": 0.0, "check": "passed"},
        "all-off": {"check": "failed: exit status 1"},
    }
    case = {"case": "decoder", "variants": variants, "check": "passed"}
    page = results_page.render([("fp8-fusions.json", report("fp8-fusions", block=case, delayed=case))])
    assert page.count("| all-on | 20 (19-21) | 0.00 | 46.66 | 0.00 | passed |") == 2
    assert "| delayed, decoder | ms |" in page
    assert "| all-off | - | - | - | - | failed: exit status 1 |" in page


def test_rates_and_floors_have_tables() -> None:
    floor = {"floor_ms": 296.01, "products_ms": 178.86, "casts_ms": 15.23, "rest_ms": 101.92}
    cases = {
        "cast activation": {"gb_per_s": {"1x128": SPREAD}, "check": "passed"},
        "product 2 x 2 x 2": {"tflops": {"bf16": SPREAD}, "check": "passed"},
        "floor decoder": {"recipes": {"block": floor}, "check": "passed"},
    }
    page = results_page.render([("fp8-kernels.json", report("fp8-kernels", **cases))])
    assert "| cast activation | 1x128 | 20 (19-21) GB/s |" in page
    assert "| product 2 x 2 x 2 | bf16 | 20 (19-21) TFLOP/s |" in page
    assert "| decoder | block | 296.0 | 178.9 | 15.2 | 101.9 |" in page


def test_pools_have_a_table() -> None:
    case = {"ms": {"ours forward": SPREAD}, "gb_per_s": {"ours forward": 3456.7}, "failed": {"aten both": "no"}}
    page = results_page.render([("max-pool.json", report("max-pool", stem={**case, "check": "aten both: no"}))])
    assert "| stem | ours forward | 20 (19-21) | 3457 | aten both: no |" in page
    assert "| stem | aten both | - | - | no |" in page


def test_inference_has_its_arms_and_its_demands() -> None:
    energy = {"joules": 1.25, "above_idle_joules": 0.75}
    arms = {
        "bf16": {
            "ms": SPREAD,
            "p95_ms": 22.5,
            "energy": energy,
            "weight_mib": 3.0,
            "error": 0.00012,
            "check": "passed",
        },
        "torchao": {"check": "failed: ImportError"},
    }
    targets = [{"what": "ours <= bf16", "ours": "ours int8", "peer": None, "value": 0.5, "outcome": "reached"}]
    case = {"arms": arms, "targets": targets, "check": "passed"}
    page = results_page.render([("inference.json", report("inference", bert=case, late={"check": "failed"}))])
    assert "| bf16 | 20 (19-21) | 22.500 | 1.250 | 0.750 | 3.0 | 0.00012 | passed |" in page
    assert "| torchao | - | - | - | - | - | - | failed: ImportError |" in page
    assert "| ours <= bf16 | ours int8 | - | 0.500 | reached |" in page


def test_weights_in_8_bits_have_a_table() -> None:
    case = {"ms": {"ours int8": SPREAD}, "tb_per_s": {"ours int8": 3.21}, "error": {"ours int8": 0.00912}}
    case |= {"failed": {"torchao int8": "no"}, "check": "passed"}
    page = results_page.render([("weight-only.json", report("weight-only", up=case))])
    assert "| up | ours int8 | 20 (19-21) | 3.2 | 0.0091 | passed |" in page
    assert "| up | torchao int8 | - | - | - | no |" in page


def test_attention_of_few_queries_has_a_table() -> None:
    case = {"ms": {"ours": SPREAD}, "tb_per_s": {"ours": 3.21}, "error": {"ours": 0.00912}, "check": "passed"}
    page = results_page.render([("few-query-attention.json", report("few-query-attention", heads=case))])
    assert "| attention | by | ms |" in page
    assert "| heads | ours | 20 (19-21) | 3.2 | 0.0091 | passed |" in page


def test_losses_are_paired_with_those_of_bf16_at_the_same_seed() -> None:
    def arm(loss: float, ms: float, *lowered: str) -> dict[str, Any]:
        return {
            "loss": loss, "ms": {**SPREAD, "median": ms}, "peak_gib": 10.0, "joules": 5000.0, "check": "passed",
            "lowered": dict.fromkeys(lowered, "block"),
        }  # fmt: skip

    cases = {
        "bf16 seed 0": arm(2.0, 20.0), "bf16 seed 1": arm(4.0, 20.0), "adaptive seed 0": arm(2.002, 16.0, "a", "b"),
        "adaptive seed 1": arm(3.98, 10.0, "a"), "block seed 2": arm(1.0, 1.0),
        "tensor seed 0": {"check": "failed", "error": "no"},
    }  # fmt: skip
    made = {**report("adaptive", **cases), "arguments": {"steps": 50}}
    page = results_page.render([("adaptive.json", made)])
    expected = "+0.10, -0.50 | -0.20 | 16 (19-21) | 1.250, 2.000 | 10.0 | 100.0 | 2, 1 | passed |"
    assert f"| adaptive | {expected}" in page
    assert "| tensor | - | - | - | - | - | - | - | failed |" in page
    assert "| block | - |" in page


def test_a_case_from_another_commit_says_so() -> None:
    case = {
        "trainer_ms": SPREAD, "hand_ms": SPREAD, "ratio": {**SPREAD, "median": 1.004}, "allowed_ratio": 1.01,
        "host_waits_per_step": {"trainer": 0.0}, "check": "passed",
    }  # fmt: skip
    page = results_page.render([("overhead.json", report("overhead", net=case, other={**case, "commit": "fedcba98"}))])
    assert "| net | 20 (19-21) | 20 (19-21) | 1.004 (19-21) | 1.01 | 0 | passed |" in page
    assert "| other (commit fedcba9) |" in page


def test_compiling_by_blocks_is_said() -> None:
    assert "block by block" not in results_page.render([("fp8-decoder.json", FP8)])
    assert "block by block" in results_page.render([("fp8-decoder.json", {**FP8, "arguments": {"regional": True}})])


def test_bars_do_not_break_a_table() -> None:
    case = {
        "step_ms": {"auto": SPREAD, "bf16": SPREAD}, "best_of_pytorch": "bf16", "auto_over_best": SPREAD,
        "choice": {"format": "bf16", "memory_format": "contiguous"}, "check": "slow | wrong",
    }  # fmt: skip
    page = results_page.render([("auto.json", report("auto", net=case))])
    assert "| net | - | 20 (19-21) bf16 | 20 (19-21) | bf16 contiguous | 20 (19-21) | slow \\| wrong |" in page


def test_check_fails_until_the_page_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fp8-decoder.json").write_text(json.dumps(FP8))
    page = tmp_path / "results.md"
    assert results_page.main(["--check"], page, tmp_path) == 1
    assert "out of date. Run `make results`" in capsys.readouterr().err
    assert not page.exists()
    assert results_page.main([], page, tmp_path) == 0
    assert results_page.main(["--check"], page, tmp_path) == 0
    assert results_page.main(["--all"], page, tmp_path) == 2
