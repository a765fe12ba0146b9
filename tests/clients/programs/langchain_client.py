"""LangChain's client of OpenAI's API."""

from asked import QUESTION, SERVER, City, show
from langchain_openai import ChatOpenAI

model = ChatOpenAI(**SERVER, model="any")
calling = model.bind_tools([City], tool_choice="any")
show(
    chat=model.invoke(QUESTION).content,
    stream="".join(chunk.content for chunk in model.stream(QUESTION)),
    structured=model.with_structured_output(City).invoke(QUESTION).name,
    tools=calling.invoke(QUESTION).tool_calls[0]["args"]["name"],
)
