"""`maml-rl report`: one HTML page of runs or of a benchmark. `page.make_report` makes it.

page      gathers and writes
tested    the tests that it is of: stored ones, or made where there are none
plots     which charts; charts draws them as SVG
tables    of scores
training  what was trained: settings, versions, commands
players   the videos
files     template, style and script
"""
