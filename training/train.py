"""Train a model on any task, evaluate it on the test split and save it for the Hub."""

from efficient_transformers.training.runs.train import main

if __name__ == "__main__":
    main()
