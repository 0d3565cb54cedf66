"use strict";
(() => {
  const find = (name) => document.getElementById(name);
  const form = find("settings"), message = find("message"), progress = find("progress"), result = find("result");
  const buttons = ["draw", "attack", "merge", "keep"].map(find);
  let running = null, latest = 0;

  const query = () => new URLSearchParams(new FormData(form)).toString();

  function say(text) {
    message.textContent = text;
    message.hidden = !text;
    if (text) message.scrollIntoView({ block: "nearest" });
  }

  async function ask(method, path, body) {
    let answer;
    try {
      answer = await fetch(path, { method, body, headers: { "X-Safepatch": "studio" } });
    } catch {
      throw new Error("the studio does not answer; is it still running?");
    }
    const said = await answer.json();
    if (!answer.ok) throw new Error(said.error.message);
    return said;
  }

  const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

  // What hangs on the settings: strengths, command lines, and the page's own address.
  async function settle() {
    const mine = ++latest;
    try {
      const said = await ask("POST", "/set", query());
      if (mine !== latest) return;
      if (find("sliders").dataset.names !== said.names) {
        find("sliders").innerHTML = said.sliders;
        find("sliders").dataset.names = said.names;
      }
      find("commands").innerHTML = said.commands;
      history.replaceState(null, "", said.link || location.pathname);
    } catch (error) {
      if (mine === latest) say(error.message);
    }
  }

  function show(state) {
    const [bar, text] = progress.children;
    if (state.share === null) bar.removeAttribute("value");
    else bar.value = state.share;
    text.textContent = state.text + (state.share === null ? "" : ` ${Math.round(100 * state.share)} %`);
  }

  async function run(path) {
    if (running) return;
    say("");
    buttons.forEach((button) => { button.disabled = true; });
    try {
      running = (await ask("POST", path, query())).job;
      show({ text: "asked", share: null });
      progress.hidden = false;
      progress.scrollIntoView({ block: "nearest" });
      for (;;) {
        const state = await ask("GET", `/jobs/${running}`);
        if (state.stage === "failed") throw new Error(state.text);
        if (state.stage === "done") {
          result.innerHTML = state.html;
          result.scrollIntoView({ block: "nearest" });
          break;
        }
        show(state);
        await wait(250);
      }
    } catch (error) {
      say(error.message);
    } finally {
      running = null;
      progress.hidden = true;
      buttons.forEach((button) => { button.disabled = false; });
    }
  }

  async function copy(text, button) {
    const before = button.textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Cannot copy";
    }
    setTimeout(() => { button.textContent = before; }, 1500);
  }

  let timer;
  form.addEventListener("input", (event) => {
    if (event.target.type === "range") event.target.nextElementSibling.textContent = (+event.target.value).toFixed(2);
    if (event.target.name === "attack") form.elements.budget.value = event.target.selectedOptions[0].dataset.budget;
    if (!running) say(""); // here and not once settled: what a button has come to meanwhile stays
    clearTimeout(timer);
    timer = setTimeout(settle, 300);
  });
  form.addEventListener("submit", (event) => { event.preventDefault(); run("/ask/draw"); });
  find("attack").addEventListener("click", () => run("/ask/attack"));
  find("merge").addEventListener("click", () => run("/ask/merge"));
  find("keep").addEventListener("click", () => run("/ask/keep"));
  find("stop").addEventListener("click", () => { if (running) ask("DELETE", `/jobs/${running}`).catch((error) => say(error.message)); });
  find("link").addEventListener("click", (event) => copy(location.href, event.target));
  document.addEventListener("click", (event) => {
    if (event.target.classList.contains("copy")) copy(event.target.previousElementSibling.textContent, event.target);
  });
})();
