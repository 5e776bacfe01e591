"""Write tables and pictures of finished runs into docs/results.md."""

from efficient_transformers.training.runs.report import main

if __name__ == "__main__":
    main()
