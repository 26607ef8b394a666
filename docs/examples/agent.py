"""An agent that speaks the OpenAI API: it drafts, criticises itself, and answers."""


async def agent(client, model, question, answer):
    """Whatever it asks is recorded as the sample's turns; what it returns is the sample's reward."""
    messages = [{"role": "user", "content": question}]
    for request in ("Find the mistakes in this.", "Now give the answer alone."):
        reply = await client.chat.completions.create(model=model, messages=messages)
        messages.append({"role": "assistant", "content": reply.choices[0].message.content})
        messages.append({"role": "user", "content": request})
    reply = await client.chat.completions.create(model=model, messages=messages)
    return float(reply.choices[0].message.content.strip() == answer)
