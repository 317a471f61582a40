"""What people see of a run: lines, pictures, answers, MLflow."""
