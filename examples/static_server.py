"""
Serve a folder over HTTP, without blocking on its disk.

    FOLDER=. PORT=8080 twistd --reactor=rtsig-epoll -ny examples/static_server.py
"""

from __future__ import annotations

import os

from twisted.application.service import Application
from twisted.application.strports import service
from twisted.web.server import Site

from twisted_rtsig.files.web import StaticResource

folder = os.environ.get("FOLDER", ".")
port = os.environ.get("PORT", "8080")

# twistd runs the object of this name.
application = Application("static")
site = Site(StaticResource(folder))
service(f"tcp:{port}:interface=127.0.0.1", site).setServiceParent(application)
