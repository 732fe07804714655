"""What happens on the training thread: the loop and its data, its safe points, and the requests that reach
it.

``loop`` is plain code without threads, clocks or asyncio. It meets the world through its host
(``protocols.Host``).
"""
