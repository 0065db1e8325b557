"""What is made of the results: tables and pictures of the documentation, targets and why they are missed."""
