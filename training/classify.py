"""Trains a document classifier, evaluates it on the test split and saves it ready for the Hub."""

from efficient_transformers.training.tasks.classify import main

if __name__ == "__main__":
    main()
