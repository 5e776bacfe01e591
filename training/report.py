"""Tables, and pictures, of finished runs, written into docs/results.md between the marks of their own."""

from efficient_transformers.training.runs.report import main

if __name__ == "__main__":
    main()
