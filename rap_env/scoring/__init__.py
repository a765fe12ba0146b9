"""The only room that runs the model for a reward: texts, mask scores, task accuracies."""
