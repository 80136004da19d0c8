"""Tables, each made by one command. A row is printed only beside the honest baseline: plain sampling with as many evaluations."""
