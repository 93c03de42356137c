"""The scale suite: optimizers judged on models of the size that people train.

`corpora` reads data, `models` are Flax modules, `tasks` joins the two, `contenders` are the
optimizers and their grids, `run` trains one cell, `report` makes the table and the plot.
"""
