"""Several configs, one after another: the runs of a table."""

from efficient_transformers.training.runs.train_all import main

if __name__ == "__main__":
    main()
