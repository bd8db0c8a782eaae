"""Studies: arms that differ in one thing, trained with the same seeds, and what their differences come to.

arms.py         from a study to the runs that it consists of
results.py      what the runs of a study measured, arm by arm and seed by seed
statistics.py   paired differences with confidence intervals, and what is concluded from them
pictures.py     curves of the arms, and differences over tokens
report.py       all of that as HTML, Markdown and a picture
"""
