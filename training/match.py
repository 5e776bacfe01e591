"""Trains a model that tells whether two documents match, evaluates it on the test split and saves it."""

from efficient_transformers.training.tasks.match import main

if __name__ == "__main__":
    main()
