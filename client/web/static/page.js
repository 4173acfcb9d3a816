// What the page cannot say by itself: that its server is gone. The stream goes on by itself when it is back.
addEventListener("htmx:sse:error", () => {
  const trouble = document.getElementById("trouble");
  if (trouble.childElementCount === 0) {
    trouble.append(Object.assign(document.createElement("p"), {
      className: "warning",
      textContent: "offsite web does not answer, or has begun anew: what is below is as it last was. " +
        "Where it runs, Enter prints a login link.",
    }));
  }
});

// htmx may have looked at the page before its extension was there; then nobody listens to the stream.
addEventListener("load", () => {
  for (const one of document.querySelectorAll("[hx-sse\\:connect]:not([data-htmx-powered])")) htmx.process(one);
});
