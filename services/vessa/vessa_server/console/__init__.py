"""The browser console: static pages, served without a build step."""
