"""Bag-of-words baseline: train and test a linear SVM on TF-IDF features of the windows of a classifier's config."""

from efficient_transformers.training.runs.bag_of_words import main

if __name__ == "__main__":
    main()
