"""The only package that runs the model for a reward: texts, mask scores, task accuracies."""
