"""Train a model of any task: evaluates it on the test split and saves it ready for the Hub."""

from efficient_transformers.training.runs.train import main

if __name__ == "__main__":
    main()
