"""The report of one or several runs, from their files alone: `drlora report RUN [RUN ...]`."""

FORMATS = ("html", "png", "svg", "md")
