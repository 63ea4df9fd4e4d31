"""A model behind HTTP: `ov3fast serve`.

    server.py     uvicorn: address, time limits, drain
    app.py        endpoints, and what they answer
    service.py    a request's way: admit, receive, decode, queue, answer or refuse
    intake.py     bodies to images and texts, within limits
    answers.py    results to JSON, .npy, .safetensors, PNG
    batching.py   one thread for the model; what waits rides together
    jobs.py       what runs in it, in batches that change no bit
    options.py    limits; metrics.py what is counted; errors.py refusals

Needs the extra `serve`.
"""
