"""`maml-rl report`: one HTML page of runs or of a benchmark. `page.make_report` makes it, and
`maml_rl.supervised.page.make_report` that of supervised runs.

page      gathers and fills in
sheet     what pages of both modes are made of
tested    the tests that it is of: stored ones, or made where there are none
plots     which charts; charts draws them as SVG
tables    of scores
training  what was trained: settings, versions, commands
players   the videos
files     templates, style and script
"""
