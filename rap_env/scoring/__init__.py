"""The only package that runs the model for a reward: texts, plan scores, task accuracies."""
