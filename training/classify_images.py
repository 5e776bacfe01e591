"""Trains an image classifier, evaluates it on the test split and saves it ready for the Hub."""

from efficient_transformers.training.tasks.classify_images import main

if __name__ == "__main__":
    main()
