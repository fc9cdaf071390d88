"""Where images come from: sources, prompts, class names and class trees."""
