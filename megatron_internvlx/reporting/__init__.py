"""Output of a run for people: lines, pictures, answers, MLflow."""
