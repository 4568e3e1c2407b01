"""`python -m deepseek_mp` is the command `deepseek-mp`."""

from deepseek_mp.cli.app import main

if __name__ == "__main__":
    raise SystemExit(main())
