"""How attention is spelled in a graph: operators, masks, layouts."""
