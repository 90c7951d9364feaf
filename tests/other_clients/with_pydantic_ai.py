"""pydantic-ai: two turns with a tool at hand, the first turn's messages as history, and a stream."""

import asyncio
import os

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=f"{os.environ['ONEBASE_URL']}/v1", api_key=os.environ["ONEBASE_KEY"])
agent = Agent(OpenAIChatModel("tiny", provider=provider), model_settings={"max_tokens": 30})


@agent.tool_plain
def clock() -> str:
    """Tells the time."""
    return "noon"


async def main() -> None:
    first = await agent.run("hi")
    assert first.output
    second = await agent.run("and now?", message_history=first.all_messages())
    assert second.output
    async with agent.run_stream("hi") as streamed:
        assert await streamed.get_output() == first.output


asyncio.run(main())
print("pydantic-ai: well")
