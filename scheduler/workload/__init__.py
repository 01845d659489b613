"""What is run: the training's functions, the studies, and the plan for them."""
