// Saving a trace, and opening one: by a file chooser, or dropped anywhere on the page.

const $ = (id) => document.getElementById(id);

/** save: () -> the file's text. open: (text, name) shows a file. failed: (message). */
export function setupFiles({ save, open, failed }) {
  $("save").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([save()], { type: "application/json" }));
    link.download = "trace.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  });
  $("open").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    read([...$("file").files]);
    $("file").value = ""; // so that the same file can be chosen again
  });

  let inside = 0; // dragenter and dragleave come for each element on the way
  const drags = (event) => event.dataTransfer?.types.includes("Files");
  const mark = (change) => {
    inside = Math.max(0, inside + change);
    document.body.classList.toggle("dropping", inside > 0);
  };
  addEventListener("dragenter", (event) => drags(event) && mark(1));
  addEventListener("dragleave", (event) => drags(event) && mark(-1));
  addEventListener("dragover", (event) => drags(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!drags(event)) return;
    event.preventDefault();
    mark(-inside);
    read([...event.dataTransfer.files]);
  });

  async function read(files) {
    if (!files.length) return;
    if (files.length > 1) return failed(`${files.length} files were given; open one trace at a time`);
    try {
      open(await files[0].text(), files[0].name);
    } catch (error) {
      failed(error.message);
    }
  }
}
