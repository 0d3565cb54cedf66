"""What patches learn from: aligned counterfactual pairs and prompt sets."""
