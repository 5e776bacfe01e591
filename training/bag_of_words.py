"""What a bag of words knows: a linear SVM of TF-IDF, trained and tested on the windows of a classifier's config."""

from efficient_transformers.training.runs.bag_of_words import main

if __name__ == "__main__":
    main()
