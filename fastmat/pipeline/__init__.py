"""Vision experts, and an agent that calls them, under attack.

MM-ReAct (arXiv 2303.11381) is a prompting system in which a language model calls vision experts; it has no benchmark of
its own. What can be measured is how attacked pictures change what the experts answer, and what the agent then says.

An expert is one file here with one class, and a line in `fastmat.build.EXPERTS`.
"""
