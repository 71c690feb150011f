"""Objectives: what is minimised, given transitions. One a file; pure functions of numbers and tensors."""
