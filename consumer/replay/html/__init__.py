"""Show the findings of a replay as one HTML page.

page.py puts the sections together, sections.py and rebuild_sections.py write them, elements.py escapes all text. Of
consumer they import replay/outcomes.py alone. Nothing is counted again, and the only file that is read is style.css.
"""
