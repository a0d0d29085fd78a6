"""The eager engine: calls that keep nothing for backward but what they need to be replayed.

NOTE [How a call forgets and remembers]

1. A call runs its function with gradients on, so the graph is the real graph. A pack hook gives autograd an empty
   `Handle` for every tensor that it wants to save. Until the call is closed the handle still holds the value, so that
   a function may differentiate inside itself (`torch.autograd.grad`).
2. Every activation between calls is a `Slot`. It holds its value until a call consumes it; from then on it holds that
   call, which can rebuild it. An output that *is* an input (the stream that a coupling passes on) keeps its slot.
3. On the first unpack a call is rebuilt: its output slots are pulled (which may invert later calls; iteratively, since
   chains are long), the operation's replay inverts and runs the function once more under a hook that captures what is
   saved, in the same order, and each handle gets its tensor.
4. In a backward that frees its graph, each slot that a rebuilt call filled holds its value alone from then on, and the
   later calls are freed behind it. Where the graph is kept, rebuilt values are dropped again: handles when the next
   call is rebuilt, slots when their producer is, and all that is left when the backward ends.
5. References only point forward: graph -> call -> output slot -> consuming call. A call therefore holds side inputs and
   parameters without their graphs, and the slots of its inputs weakly. Nothing waits for the garbage collector.
6. A replay happens as it was (`Surroundings`) and is checked: outputs and parameters unchanged, the same tensors saved,
   and the inputs come back as they were (`fingerprint`). A call that keeps its inputs compares what autograd saved, so
   that its replay may stop there; one that is checked always compares its outputs.
7. A call whose parameters have hooks that their gradients call is rebuilt before any node of its graph runs, not only
   when one unpacks: a parameter whose gradient needs nothing saved, a bias say, may get it first, and its hook may step
   an optimizer.

A chain ``x -> f -> a -> g -> b -> h -> y`` with ``y`` in the caller's hands. A slot is ``[value]``, or ``[ ]``
with an arrow to the call that can rebuild it; a graph with empty handles waits behind each call.

    after forward:          [ ]-->f-->[ ]-->g-->[ ]-->h-->[y]           y alone is held
    backward comes to h:    [ ]-->f-->[ ]-->g-->[b]<--h   [y]           h is replayed: b from y, its handles filled
    backward comes to g:    [ ]-->f-->[a]<--g   [b]                     g is replayed from b; h and y are let go
    backward comes to f:    [x]<--f   [a]                               f is replayed from a
    after backward:         nothing of it is left; x is the caller's
"""
