"""Show the findings of a replay as one HTML page.

page.py puts the sections together, sections.py and rebuild_sections.py write them, elements.py escapes all text. The
modules import core/, the names of outcomes (replay/outcomes.py) and the standard library; nothing counts again. The
only file that is read is style.css.
"""
