"""Evaluate a finished run on its test split, optionally with other settings."""

from efficient_transformers.training.runs.evaluate import main

if __name__ == "__main__":
    main()
