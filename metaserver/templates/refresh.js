// Replaces what the page shows every five seconds while somebody looks; without it, the page is as it was loaded.
const note = document.getElementById("note");
async function refresh() {
  if (document.hidden) return;
  try {
    const reply = await fetch(location.pathname, { cache: "no-store", signal: AbortSignal.timeout(10000) });
    if (!reply.ok) throw new Error(reply.status);
    const page = new DOMParser().parseFromString(await reply.text(), "text/html");
    document.querySelector("main").replaceWith(document.adoptNode(page.querySelector("main")));
    document.title = page.title;
    note.textContent = "";
  } catch (error) {
    note.textContent = "The metaserver does not answer: what is shown is old.";
  }
}
setInterval(refresh, 5000);
