// Asks the server, and says in the toast what it refuses.

export async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  for (let attempt = 0; ; attempt += 1) {
    const answer = await fetch(path, options).catch(() => null);
    if (answer === null) throw new Error("The server does not answer: is mlx-aimv2 serve still running?");
    if (answer.status === 503 && attempt < 5) {
      await sleep(1000 * Number(answer.headers.get("retry-after") ?? 1));
      continue;
    }
    if (answer.ok) return answer.json();
    const text = await answer.text();
    throw new Error(answer.headers.get("content-type")?.includes("json") ? JSON.parse(text).error.message : text);
  }
}

export const sleep = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

export function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

export const floats = (base64) => new Float32Array(bytes(base64).buffer);

let timer;

export function say(message) {
  const toast = document.getElementById("toast");
  toast.textContent = message;
  toast.hidden = false;
  clearTimeout(timer);
  timer = setTimeout(() => { toast.hidden = true; }, 6000);
}

// Runs what a handler does; what goes wrong is said.
export const trying = (work) => async (...given) => {
  try {
    return await work(...given);
  } catch (error) {
    say(error.message);
    return undefined;
  }
};

export const count = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
