// A picture that is pressed opens over its reference. The slider says where one ends and the other begins.
"use strict";
const dialog = document.querySelector("dialog");
const part = (name) => dialog.querySelector(name);
const stage = part(".stage"), slider = part("input");

function wipe() {
  stage.style.setProperty("--at", slider.value + "%");
}

function copy(element, into) {
  part(into).replaceChildren(...element.cloneNode(true).childNodes);
}

function open(button) {
  const image = button.querySelector("img"), figure = button.closest("figure");
  const reference = document.getElementById(button.dataset.reference).cloneNode();
  reference.removeAttribute("id");
  stage.replaceChildren(reference, image.cloneNode());
  dialog.style.setProperty("--ratio", image.width / image.height);
  copy(figure.closest(".sample").querySelector("h3"), "h3");
  copy(figure.querySelector("figcaption"), ".numbers");
  copy(figure.querySelector("figcaption b"), ".right");
  slider.value = 50;
  wipe();
  dialog.showModal();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-reference]");
  if (button) open(button);
  if (event.target === dialog) dialog.close(); // beside the dialog
});
slider.addEventListener("input", wipe);
stage.addEventListener("pointermove", (event) => {
  if (!event.buttons) return;
  slider.value = (100 * event.offsetX) / stage.clientWidth;
  wipe();
});
