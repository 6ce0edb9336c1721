"""
A Scrapy spider on this reactor: the titles of a page and of all pages it links to.

    pip install 'twisted-rtsig[asyncio-libraries]'
    python examples/headings_spider.py URL

It prints one JSON object for each page.  In a Scrapy project, put TWISTED_REACTOR, as
below, into settings.py.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import scrapy
from scrapy.crawler import CrawlerProcess
from scrapy.http import Response

SETTINGS = {
    "TWISTED_REACTOR": "twisted_rtsig.asyncioreactor.AsyncioReactor",
    "DEPTH_LIMIT": 1,
    "FEEDS": {"stdout:": {"format": "jsonlines"}},
    "LOG_LEVEL": "ERROR",
    "TELNETCONSOLE_ENABLED": False,
}


class Headings(scrapy.Spider):
    """Collects titles; its ``start_urls`` are the pages to start from."""

    name = "headings"

    async def parse(self, response: Response, **kwargs: Any) -> AsyncIterator[Any]:
        """Yield the title of the page, and a request for each page it links to."""
        # Any asyncio coroutine can be awaited here.
        await asyncio.sleep(0)
        yield {"url": response.url, "title": response.css("title::text").get()}
        for link in response.css("a::attr(href)").getall():
            yield response.follow(link, self.parse)


def main() -> None:
    process = CrawlerProcess(SETTINGS)
    process.crawl(Headings, start_urls=sys.argv[1:])
    process.start()


if __name__ == "__main__":
    main()
