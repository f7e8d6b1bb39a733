"""Plain values -> one self-contained HTML page: no network, no other file, readable on a phone and on paper.

::

    values.py      what a page shows, as its caller hands it over: ComparisonPage, ArmView, FeatureMap, AuditPage
    answers.py     predictions -> what is drawn of them: confusions, scores of classes, reliability, telling images
    scales.py      numbers -> places on an axis, and the ticks that people like to read
    figures.py     numbers -> geometry of each figure, and its finding in words
    colours.py     the colours of arms and classes, dark enough on white and light enough on black
    comparison.py  the page of a comparison, and of a ranking
    audit.py       the page of an audit
    filling.py     content through a template, within a size
    templates/     HTML, CSS and the little JavaScript

The figures are SVG that the templates write from plain geometry, and not matplotlib's: places are per cent, so that a
figure is as wide as its screen while its letters stay the size of the text, on a phone too; the colours are CSS
variables and follow the reader's colour scheme; and a figure is some hundred bytes for each mark instead of a hundred
kilobytes. What must not run does not: everything is escaped by Jinja, and the page's own policy
(Content-Security-Policy) allows one script, by its digest, and no address at all.
"""

from featcache.pages.audit import render_audit
from featcache.pages.comparison import render_comparison
from featcache.pages.values import ArmView, AuditPage, ComparisonPage, FeatureMap

__all__ = ["ArmView", "AuditPage", "ComparisonPage", "FeatureMap", "render_audit", "render_comparison"]
