"""The answer of `deepseek-mp profile`: a report with a plan, printed and written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deepseek_mp.cli.output import print_record, print_text, terminal_width
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.profiler import MetricReport, ProfileReport
from deepseek_mp.profiler.text import render_profile


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was found; without data there is no plan."""

    report: ProfileReport | MetricReport
    plan: PrecisionPlan | None

    def deliver(self, *, out: Path | None, plan: Path | None, as_json: bool) -> None:
        """Write the files asked for, and print."""
        if out is not None:
            self.report.save(out)
        if plan is not None and self.plan is not None:
            self.plan.save(plan)
        if as_json:
            print_record({"report": self.report.to_json(), "plan": self.plan})
            return
        report = self.report
        print_text(str(report) if isinstance(report, MetricReport) else render_profile(report, terminal_width()))
        written = [f"report: {out}"] if out is not None else []
        written += [f"plan: {plan}, for deepseek-mp train --precision {plan}"] if plan is not None else []
        if written:
            print_text("\n".join(["", *written]))
