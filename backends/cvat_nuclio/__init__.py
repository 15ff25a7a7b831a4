"""The CVAT doors: nuclio function, gateway, agent."""
