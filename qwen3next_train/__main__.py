"""``python -m qwen3next_train``."""

from qwen3next_train.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
