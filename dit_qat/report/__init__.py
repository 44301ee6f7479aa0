"""What every report is made of: the page, its look, and what is drawn of layers."""
