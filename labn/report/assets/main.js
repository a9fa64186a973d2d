// Charts: a click on a legend entry shows or hides its line. Then gallery and player, if the page has them.
for (const button of document.querySelectorAll("[data-toggles]")) {
  button.addEventListener("click", () => {
    const show = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", String(show));
    for (const line of button.closest(".chart-group").querySelectorAll("[data-series]")) {
      if (line.dataset.series === button.dataset.toggles) line.style.display = show ? "" : "none";
    }
  });
}
if (byId("gallery")) startGallery();
if (byId("player")) startPlayer();
document.documentElement.dataset.ready = "1";
