"""A harness: a user's function that calls the OpenAI API, and the sample that is made of what it calls.

play(client, **row) --HTTP--> endpoint.py --Call--> recording.py --tokens--> engine
        ^                                               |                      |
        `------------ chat.py: answers in OpenAI's JSON <----- Generation -----'
"""
