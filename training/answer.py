"""Trains a model that finds the answer to a question in a long text, evaluates it on the test split and saves it."""

from efficient_transformers.training.tasks.answer import main

if __name__ == "__main__":
    main()
